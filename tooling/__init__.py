"""What the make targets do: install, execute, clean, render, scan, check. Part of the source tree, never installed."""
