"""What `quantkit verify` looks at: each module finds one kind of fault in what a downloader got, and raises none."""
