"""Reports as pages for people: one file each, without network, for screens of any width and for paper."""
