"""Sets of images: find, decode, augment and batch them."""
