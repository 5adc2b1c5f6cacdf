"""Measure this service beside others: same machine, same minute, same model, same answers."""
