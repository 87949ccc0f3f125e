"""What timm and the Hugging Face Hub want of a package of models."""
