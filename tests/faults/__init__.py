"""The fault suite: what can go wrong around echod, done to a real one, while a bystander watches."""
