"""The frozen CLIP. Plain torch: nothing here knows of Ray."""
