"""BERT and the families of its shape."""

from lsg_patch.families.base import Family, after_padding_row

BERT = Family("bert", ("BertModel",))
ELECTRA = Family("electra", ("ElectraModel",))
ROBERTA = Family("roberta", ("RobertaModel",), position_offset=after_padding_row)
XLM_ROBERTA = Family("xlm-roberta", ("XLMRobertaModel",), position_offset=after_padding_row)
CAMEMBERT = Family("camembert", ("CamembertModel",), position_offset=after_padding_row)

FAMILIES = (BERT, CAMEMBERT, ELECTRA, ROBERTA, XLM_ROBERTA)
