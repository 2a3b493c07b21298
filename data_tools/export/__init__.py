"""Writing converted sources in the layouts of other libraries."""
