"""The default data and models: a captioned shape world rendered on the spot and a tiny CLIP that two CPU cores can train."""
