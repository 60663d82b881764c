"""Checkpoint -> EvalReport: held-out scores, their intervals, what was forgotten, and the gate's verdict."""
