"""The service without Ray and without a model, as processes that tests kill, freeze and thaw."""
