"""schemathesis on a running service: whatever is sent, the answer is as the OpenAPI document says."""
