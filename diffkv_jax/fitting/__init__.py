"""Policies chosen by measurement: `fit_policy` searches, `inspect_model` shows why."""
