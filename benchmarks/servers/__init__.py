"""The contenders that are not this project: each the plain way its documentation shows."""
