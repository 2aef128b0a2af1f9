"""Steering: functions from activations ``[batch, d]`` to activations ``[batch, d]``. Knows SAEs, not the harness."""
