"""What is served: the models folder, the versions loaded from it, and how workers change them together."""
