"""Claims with seeds: methods tuned alike, trained, measured by one protocol, and compared on one page. One command."""
