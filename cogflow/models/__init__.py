"""The models of the CogVideoX family: facts, inputs of the transformers, and loading of components.

To add a model, add its :class:`~cogflow.models.family.ModelSpec` to ``MODEL_SPECS`` in ``family.py``, its name to
``MODELS`` in ``cogflow/config/model_section.py``, and a file ``configs/model/<name>.yaml``. ``tests/config`` fails
until the three agree. CONTRIBUTING.md, "Add a model", also describes the conversion of its SAT weights.
"""
