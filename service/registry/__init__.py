"""What is served: the models folder, the versions opened from it, and how workers change them together."""
