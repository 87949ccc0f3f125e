"""What the families of plain ViTs share, around timm's classes; it registers no names of its own."""
