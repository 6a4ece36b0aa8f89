"""What the service and its workers say to each other and to the world: standard library and pydantic only."""
