"""Real S3 servers for tests and development, on loopback, in a folder of their own, gone when they are left."""
