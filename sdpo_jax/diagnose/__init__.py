"""What can learn here, measured before anything is trained: `--mode=diagnose`."""
