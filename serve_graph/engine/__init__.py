"""The Wan engine: a step loop over diffusers' own classes. Knows nothing of Ray, HTTP, stores or prompts as text."""
