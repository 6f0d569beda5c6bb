"""Files, and other packages' layouts."""
