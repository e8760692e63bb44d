"""What a merge of vocabularies keeps: the segmentation of a language, and the rows of shared new tokens."""
