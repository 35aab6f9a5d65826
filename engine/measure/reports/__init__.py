"""Self-contained HTML reports, with charts as inline SVG and no network access."""
