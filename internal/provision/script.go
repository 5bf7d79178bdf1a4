package provision

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	_ "embed" // the script
	"fmt"
	"slices"
	"strings"
	"text/template"

	"muster/internal/esp"
	"muster/internal/esp/flashcrypt"
	"muster/internal/fleet"
)

//go:embed flash.sh.tmpl
var scriptText string

var scriptTemplate = template.Must(template.New(ScriptFile).Parse(scriptText))

// scriptStep is a Step as the script writes it.
type scriptStep struct {
	Step
	List string // of the blocks
	Line string // the arguments
}

type scriptRegion struct{ Offset, File string }

// scriptCheck is an encrypted file that espsecure shall decrypt again.
type scriptCheck struct {
	Options, Offset, File, Clear string
	Signed                       bool
}

type scriptData struct {
	Device, Chip, MAC, Sums, FlashKey string
	Erase                             bool
	Revision                          esp.Revision // of the chip, at least; 0: any
	Regions                           []scriptRegion
	Steps, KeySteps, Burns            []scriptStep
	Last                              *scriptStep
	Close                             string // the id of Last
	LastBurn                          string // the id of the last of Burns
	Warnings                          []string
	Checks                            []scriptCheck
	Signed                            []string // files with a signature in the clear
	Secrets                           []string // files to remove in the end
}

// script returns flash.sh of a device. All that it takes from outside are words of a narrow form: the device's id, a MAC address, and file
// names that fileOf has made.
func (pl *Plan) script(d Device, s Secrets, files []File) ([]byte, error) {
	data := scriptData{Device: string(d.ID), Chip: pl.p.Chip.Name, MAC: d.MAC, Sums: SumsFile, FlashKey: flashKeyFile, Erase: pl.p.App != nil}
	if len(pl.p.SecureBoot) > 0 {
		data.Revision = esp.Revision(pl.p.Chip.SchemeMinRev)
	}
	for _, r := range pl.regions {
		data.Regions = append(data.Regions, scriptRegion{fmt.Sprintf("0x%x", r.Offset), r.File})
	}
	for _, step := range pl.steps {
		line := scriptStep{step, strings.Join(step.Blocks, " "), strings.Join(step.Args, " ")}
		data.Steps = append(data.Steps, line)
		if len(step.Blocks) > 0 {
			data.KeySteps = append(data.KeySteps, line)
		}
		if step.Last {
			data.Last, data.Close = &line, step.ID
		} else {
			data.Burns = append(data.Burns, line)
			data.LastBurn = step.ID
		}
	}
	if !pl.p.Escrowed && (pl.p.Flash != "" || pl.p.NVS != Clear) {
		data.Warnings = append(data.Warnings, "The keys of this device are in no escrow: what they protect can never be read again.")
	}
	for _, f := range files {
		if f.Secret {
			data.Secrets = append(data.Secrets, f.Name)
		}
	}
	if err := pl.scriptChecks(&data, s, files); err != nil {
		return nil, err
	}
	var out bytes.Buffer
	if err := scriptTemplate.Execute(&out, data); err != nil {
		return nil, fleet.Wrap(fleet.Internal, err, "write %s", ScriptFile)
	}
	return out.Bytes(), nil
}

// scriptChecks has every encrypted file decrypted by espsecure, and every signature shown.
func (pl *Plan) scriptChecks(data *scriptData, s Secrets, files []File) error {
	if pl.p.Flash == "" {
		for _, r := range pl.regions {
			if len(pl.p.SecureBoot) > 0 && (r.File == bootloaderFile || r.File == appFile) {
				data.Signed = append(data.Signed, r.File)
			}
		}
		return nil
	}
	cipher, err := flashcrypt.New(pl.p.Flash, s.Flash)
	if err != nil {
		return err
	}
	options := "--aes-xts"
	if pl.p.Flash == esp.CipherESP32 {
		options = fmt.Sprintf("--flash-crypt-conf 0x%x", flashcrypt.DefaultConfig)
	}
	for _, r := range pl.regions {
		signed := len(pl.p.SecureBoot) > 0 && (r.File == bootloaderFile || r.File == appFile)
		if !r.Encrypted {
			continue
		}
		i := slices.IndexFunc(files, func(f File) bool { return f.Name == r.File })
		sum := r.clearSum
		if r.content == nil {
			clear := make([]byte, len(files[i].Data))
			if err := cipher.Decrypt(clear, files[i].Data, r.Offset); err != nil {
				return err
			}
			sum = sha256.Sum256(clear)
		}
		data.Checks = append(data.Checks, scriptCheck{options, fmt.Sprintf("0x%x", r.Offset), r.File, fmt.Sprintf("%x", sum), signed})
	}
	return nil
}

func sortFiles(files []File) {
	slices.SortFunc(files, func(a, b File) int { return cmp.Compare(a.Name, b.Name) })
}

// sumFile returns the file with the SHA-256 of every file, as sha256sum writes it.
func sumFile(files []File) File {
	var b bytes.Buffer
	for _, f := range files {
		fmt.Fprintf(&b, "%x  %s\n", f.SHA256(), f.Name)
	}
	return File{Name: SumsFile, Data: b.Bytes()}
}
