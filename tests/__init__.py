"""Tests of the service, of training, and of both over real HTTP."""
