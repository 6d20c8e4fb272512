"""Where clips and job records live. Imports `schemas` only; knows nothing of Ray, torch or HTTP servers."""
