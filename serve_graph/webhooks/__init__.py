"""Webhooks: who may be called, how it is signed, sent and tried again. Knows no Ray, no store and no job service."""
