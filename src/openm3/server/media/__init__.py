"""Pictures and videos in requests: how they are named, where their bytes come from, and who decodes them."""
