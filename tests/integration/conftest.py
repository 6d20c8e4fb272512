"""Puts this folder on the path: its helpers are imported from the folder below as well."""
