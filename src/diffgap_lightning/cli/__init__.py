"""The `diffgap` command: one file a command; `main` dispatches and imports only what the chosen command uses."""
