package audit_test

// Computed from the description of the encoding by a program that shares no code with this one.
const (
	wantGenesis = "0044b4c3fff5fbfab6924660eb7cd42fb10191f1ca294fc09635ca6dcbe5c442"
	wantEntry   = "a24e5fe1a0af807949acf588cf9f738966e00701509b9be651e755ad2e295d9a"
)
