"""Dataclasses of the JSON files that cogflow writes and reads again, one module for each subject.

Plain data, no behaviour.
"""
