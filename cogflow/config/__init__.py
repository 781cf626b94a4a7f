"""Settings: the schema, what the yaml files and the command line choose, and the checks, which report all problems at
once."""
