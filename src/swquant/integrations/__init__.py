"""swquant in the places where people already work: each module is named after the package that it goes into."""
