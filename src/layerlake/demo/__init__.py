"""The demo: two small trained models, the standard library's text, and a tour from capture to report."""
