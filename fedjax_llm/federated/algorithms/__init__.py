"""Published methods: a file a family, each a cited composition."""
