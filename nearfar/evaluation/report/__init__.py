"""Reports of comparisons: pictures and one page that holds them."""
