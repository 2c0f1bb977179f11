"""Projects: a manifest names the prompts to be cached, and `sync` keeps them so."""
