package cli

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"sync"
	"time"

	"github.com/go-json-experiment/json"

	"muster/internal/provision"
)

// write puts the files of a device into a folder that takes its place whole, or not at all.
func (l *line) write(id string, files []provision.File) error {
	making := l.making(id)
	images := filepath.Join(making, imagesDir)
	if err := os.RemoveAll(images); err != nil {
		return err
	}
	dirs := map[string]bool{images: true}
	if err := os.MkdirAll(images, 0o700); err != nil {
		return err
	}
	for _, f := range files {
		path := filepath.Join(images, filepath.FromSlash(f.Name))
		if dir := filepath.Dir(path); !dirs[dir] {
			if err := os.Mkdir(dir, 0o700); err != nil {
				return err
			}
			dirs[dir] = true
		}
		if err := l.writeOne(path, f); err != nil {
			return err
		}
	}
	for dir := range dirs {
		if err := syncDir(dir); err != nil {
			return err
		}
	}
	if err := os.Rename(images, l.folder(id)); err != nil {
		return err
	}
	if err := errors.Join(syncDir(l.dir), syncDir(making)); err != nil {
		return err
	}
	return os.RemoveAll(making)
}

func (l *line) writeOne(path string, f provision.File) error {
	mode := fs.FileMode(0o600)
	if f.Run {
		mode = 0o700
	}
	if f.Common {
		from, err := l.common.get(filepath.Join(l.dir, commonDir), f)
		if err != nil {
			return err
		}
		if os.Link(from, path) == nil {
			return nil
		} // a file system without links: a copy does as well
	}
	return writeSynced(path, f.Data, mode)
}

func writeSynced(path string, data []byte, mode fs.FileMode) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	return errors.Join(err, f.Sync(), f.Close())
}

// commonFiles are the files that devices share, each stored once. The zero value is ready.
type commonFiles struct {
	mu   sync.Mutex
	have map[[32]byte]bool
}

// get returns where the file is.
func (c *commonFiles) get(dir string, f provision.File) (string, error) {
	sum := f.SHA256()
	path := filepath.Join(dir, fmt.Sprintf("%x", sum))
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.have[sum] {
		return path, nil
	}
	// Of an earlier run the content is not believed: a link is as good as its file.
	if err := replaceFile(path, f.Data, 0o600); err != nil {
		return "", err
	}
	if c.have == nil {
		c.have = map[[32]byte]bool{}
	}
	c.have[sum] = true
	return path, nil
}

// replaceFileBy is replaceFile for content that is written step by step.
func replaceFileBy(path string, mode fs.FileMode, write func(*os.File) error) error {
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*") // 0600
	if err != nil {
		return err
	}
	defer os.Remove(f.Name()) // gone already if all went well
	if err := errors.Join(write(f), f.Chmod(mode), f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := os.Rename(f.Name(), path); err != nil {
		return err
	}
	return syncDir(filepath.Dir(path))
}

// logLine is a line of the station log. flash.sh writes the same.
type logLine struct {
	At      string `json:"at"` // RFC 3339
	Station string `json:"station"`
	Who     string `json:"who"`
	Device  string `json:"device"`
	MAC     string `json:"mac"`
	What    string `json:"what"`
	Result  string `json:"result"` // ok or failed
	Serial  string `json:"serial,omitempty"`
}

var notPlain = regexp.MustCompile(`[^A-Za-z0-9@._: -]`)

// log appends a line to the station log, in one write, so that stations that share a folder do not mix theirs.
func (l *line) log(u unit, what, result, serial string) error {
	name := func(env, other string) string {
		if v := l.a.env.Getenv(env); v != "" {
			other = v
		}
		return notPlain.ReplaceAllString(other, "")
	}
	host, _ := os.Hostname() // empty is as good
	raw, err := json.Marshal(logLine{
		At: l.a.env.Now().UTC().Format(time.RFC3339), Station: name("MUSTER_STATION", host), Who: name("MUSTER_OPERATOR", l.a.env.Getenv("USER")),
		Device: u.ID, MAC: u.mac, What: what, Result: result, Serial: serial,
	})
	if err != nil {
		return err
	}
	f, err := os.OpenFile(filepath.Join(l.dir, stationLog), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(append(raw, '\n'))
	return errors.Join(err, f.Close())
}
