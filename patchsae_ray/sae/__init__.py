"""The sparse autoencoder. Plain torch: nothing here knows of Ray."""
