"""Child processes: how training and evaluation are started, watched and stopped."""
