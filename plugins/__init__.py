"""First-party plugins, loaded by name through the entry-point group "edged"."""
