"""What owns parameters: backbones, the reward network."""
