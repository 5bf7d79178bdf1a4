package simdev

import (
	"context"
	"crypto/ecdsa"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"hash/fnv"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"muster/internal/fleet"
	"muster/internal/wire"
)

// Device is one simulated device. Make it with New; Run is its life. The other methods may be called at any time from
// any goroutine.
type Device struct {
	c       Config
	id      fleet.DeviceID
	flash   *cutFlash
	mem     memory
	running atomic.Bool
	orders  chan error // a reboot that was asked for from outside; capacity 1

	mu     sync.Mutex // guards what follows, up to the next line
	faults Faults
	counts Counts
	snap   Snapshot
	acked  ledger

	// Owned by Run.
	rnd       *rand.Rand
	seq       uint64 // of telemetry
	lastEnd   time.Time
	endpoints Endpoints
	boot      bootRecord
	fw        Firmware
	image     fleet.Hash
	conduct   conduct
	fuse      uint32 // secure version in the eFuses
	previous  slot   // what the passive slot holds
	ids       map[side]identity
	trust     *x509.CertPool
	trustKey  *ecdsa.PublicKey // nil: it takes no new bundles
	bundle    int64            // version of what it trusts; 0: what it was made with
	doors     *doors
	bootedAt  time.Time
	bound     time.Time // the earliest that it can be now
	told      time.Time // what muster said the time was, in this life; zero: nothing yet
	toldAt    time.Time
	useless   map[fleet.Serial]time.Time // certificates that did not work, and when
	partial   partial
	confirmed atomic.Bool // read by the watchdog
}

// New returns a device, or an Invalid error about its configuration. It starts nothing and writes nothing.
func New(c Config) (*Device, error) {
	c, err := c.withDefaults()
	if err != nil {
		return nil, err
	}
	id := c.Credentials.Endpoints.Device
	h := fnv.New64a()
	h.Write([]byte(id))
	f := &cutFlash{Flash: c.Flash, cut: c.Faults.PowerCut}
	return &Device{
		c: c, id: id, flash: f, mem: newMemory(f), orders: make(chan error, 1), faults: c.Faults, snap: Snapshot{Device: id, Door: wire.VhostDevices},
		rnd: rand.New(rand.NewPCG(c.Seed, h.Sum64())),
	}, nil
}

// RunAll runs devices until ctx ends, and returns the first error of any, which ends the others.
func RunAll(ctx context.Context, ds []*Device) error {
	g, ctx := errgroup.WithContext(ctx)
	for _, d := range ds {
		g.Go(func() error { return d.Run(ctx) })
	}
	return g.Wait()
}

// ID returns the device's id.
func (d *Device) ID() fleet.DeviceID { return d.id }

// Counts returns what the device has done so far.
func (d *Device) Counts() Counts {
	d.mu.Lock()
	defer d.mu.Unlock()
	c := d.counts
	c.FlashWrites = d.flash.count()
	return c
}

// Snapshot returns what the device is now.
func (d *Device) Snapshot() Snapshot {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.snap
}

// Acked returns which telemetry messages the broker acknowledged, by sequence number: none of them may be lost.
func (d *Device) Acked() []Range {
	d.mu.Lock()
	defer d.mu.Unlock()
	return append([]Range(nil), d.acked...)
}

// SetFaults replaces the device's faults. Those that concern the connection take effect from the next session on.
func (d *Device) SetFaults(f Faults) {
	d.mu.Lock()
	d.faults = f
	d.mu.Unlock()
	d.flash.set(f.PowerCut)
}

// Reboot makes a running device start again, as if somebody had pressed its button.
func (d *Device) Reboot() {
	select {
	case d.orders <- reboot{"button"}:
	default: // one is under way already
	}
}

// Service is a technician with a cable: the image in the other slot is started, if there is one that can run, as the good
// one. It is how a device comes back that an update made dark.
func (d *Device) Service() {
	select {
	case d.orders <- errService:
	default: // somebody restarts it already
	}
}

func (d *Device) fault() Faults {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.faults
}

// count changes the device's counts.
func (d *Device) count(f func(*Counts)) {
	d.mu.Lock()
	defer d.mu.Unlock()
	f(&d.counts)
}

func (d *Device) show(f func(*Snapshot)) {
	d.mu.Lock()
	defer d.mu.Unlock()
	f(&d.snap)
}

func (d *Device) emit(k Kind, format string, a ...any) {
	d.c.OnEvent(Event{time.Now(), d.id, k, fmt.Sprintf(format, a...)})
}

// reboot ends a life on purpose or by a crash. It is an error so that it ends whatever was going on.
type reboot struct{ why string }

func (r reboot) Error() string { return "reboot: " + r.why }

// Run is the device's life, from one boot to the next, until ctx ends; then it returns nil. An error is one of the flash
// itself, or a second Run. All goroutines that it started have ended when it returns.
func (d *Device) Run(ctx context.Context) error {
	if !d.running.CompareAndSwap(false, true) {
		return fleet.Errorf(fleet.Conflict, "device %s runs already", d.id)
	}
	defer d.running.Store(false)
	if d.c.Timing.Spread > 0 && !sleep(ctx, time.Duration(d.rnd.Int64N(int64(d.c.Timing.Spread)))) {
		return nil
	}
	for reason := "power-on"; ; {
		d.flash.powerOn()
		err := d.life(ctx, reason)
		if ctx.Err() != nil {
			return nil
		}
		if cut, is := errors.AsType[errPowerCut](err); is {
			reason = "power-on"
			d.count(func(c *Counts) { c.PowerCuts++ })
			d.emit(PowerCut, "%s", cut)
		} else if r, is := errors.AsType[reboot](err); is {
			reason = r.why
			d.emit(Rebooting, "%s", r.why)
		} else {
			return fmt.Errorf("device %s: %w", d.id, err)
		}
		d.count(func(c *Counts) { c.Reboots++ })
		if !sleep(ctx, d.c.Timing.Reboot) {
			return nil
		}
	}
}

// life is what happens from reset to reset. It never returns nil.
func (d *Device) life(ctx context.Context, reason string) error {
	if err := d.start(reason); err != nil {
		return err
	}
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	if d.crashesAtBoot() {
		return reboot{"panic"}
	}
	if d.dark() {
		return d.goDark(ctx)
	}
	if d.fw.Behaviour == NoMTLS {
		if err := d.trustItself(); err != nil {
			return err
		}
	}
	if after := d.conduct.crashAfter; after > 0 {
		defer time.AfterFunc(after, func() { stop(reboot{"panic"}) }).Stop()
	}
	d.confirmed.Store(!d.boot.Verify)
	if d.boot.Verify && d.c.Timing.Watchdog > 0 {
		defer time.AfterFunc(d.c.Timing.Watchdog, func() {
			if !d.confirmed.Load() {
				stop(errWatchdog)
			}
		}).Stop()
	}
	err := d.online(ctx)
	if errors.Is(err, errService) {
		return d.service()
	}
	if ctx.Err() != nil && !isPowerCut(err) {
		err = context.Cause(ctx)
	}
	if errors.Is(err, errWatchdog) {
		return d.goBack("no answer from muster", "rollback")
	}
	return err
}

var (
	errWatchdog = errors.New("watchdog")
	errService  = errors.New("a technician")
)

// crashesAtBoot reports whether this boot ends before the network.
func (d *Device) crashesAtBoot() bool {
	switch {
	case d.fw.Behaviour == BootLoop:
		return true
	case !d.boot.Verify:
		return false
	}
	return d.fault().BootLoop || d.boot.Boots <= d.conduct.failedBoots || !d.fw.startsOver(d.previous.fw.Version)
}

// dark reports whether what runs has no way to the network.
func (d *Device) dark() bool { return d.fw.Behaviour == Dark || d.boot.Dark }

// trustItself marks an image valid that confirms itself before it has reached anybody, as stock Arduino images do
// (esp32.md §0.11).
func (d *Device) trustItself() error {
	if !d.boot.Verify {
		return nil
	}
	d.boot = bootRecord{Active: d.boot.Active, Dark: d.boot.Dark}
	return d.mem.boot.write(d.boot)
}

// goDark runs without a network until the power goes or a technician comes. The image counts as good.
func (d *Device) goDark(ctx context.Context) error {
	if err := d.trustItself(); err != nil {
		return err
	}
	d.emit(WentDark, "%s never connects", d.fw.Version)
	if after := d.fault().Dark.After; after > 0 {
		defer time.AfterFunc(after, d.Service).Stop()
	}
	err := d.idle(ctx)
	if errors.Is(err, errService) {
		return d.service()
	}
	return err
}

// service starts the other slot for good, without a report: no update undid itself.
func (d *Device) service() error {
	if d.previous.image != "" {
		if err := d.mem.boot.write(bootRecord{Active: d.boot.Active.other(), Failed: d.image}); err != nil {
			return err
		}
	}
	d.emit(Serviced, "%s instead of %s", d.previous.fw.Version, d.fw.Version)
	return reboot{"power-on"}
}

func isPowerCut(err error) bool {
	_, is := errors.AsType[errPowerCut](err)
	return is
}

// start is the bootloader and the begin of the firmware: what runs, and what it knows.
func (d *Device) start(reason string) error {
	endpoints, err := d.mem.make(d.c.Credentials, d.c.Firmware)
	if err != nil {
		return err
	}
	d.endpoints = endpoints
	d.bootedAt, d.told, d.partial, d.useless = time.Now(), time.Time{}, partial{}, map[fleet.Serial]time.Time{}
	if d.fault().LoseKeys {
		if err := d.mem.forgetKeys(); err != nil {
			return err
		}
		d.mu.Lock()
		d.faults.LoseKeys = false
		d.mu.Unlock()
	}
	if err := d.loadFirmware(reason); err != nil {
		return err
	}
	if err := d.loadTrust(); err != nil {
		return err
	}
	if err := d.loadCredentials(); err != nil {
		return err
	}
	d.show(func(s *Snapshot) { s.Version, s.Image, s.Boot = d.fw.Version, d.image, reason })
	d.emit(Booted, "%s after %s", d.fw, reason)
	return nil
}

// loadFirmware picks the slot to run. An image that is torn or has failed too often gives way to the other slot, and
// where there is none, to what the device was made with.
func (d *Device) loadFirmware(reason string) error {
	fuse, _, err := d.mem.fuse.read()
	if err != nil {
		return err
	}
	d.fuse = max(fuse, d.c.SecureVersion)
	boot, seq, err := d.mem.boot.read()
	if err != nil {
		return err
	}
	if seq == 0 {
		boot = bootRecord{Active: sideA}
	}
	d.boot = boot
	if d.previous, _, err = d.readSlot(boot.Active.other()); err != nil {
		return err
	}
	ok, err := d.loadImage(boot.Active)
	if err != nil {
		return err
	}
	switch {
	case ok && !boot.Verify:
		return nil
	case ok && boot.Boots < d.c.Timing.BootTries:
		d.boot.Boots++
		return d.mem.boot.write(d.boot)
	case ok:
		return d.goBack(fmt.Sprintf("%d boots failed", boot.Boots), reason)
	case boot.Verify:
		return d.goBack("the image is damaged, or its secure version too low", reason)
	}
	if ok, err = d.loadImage(boot.Active.other()); err != nil {
		return err
	}
	if ok {
		d.boot.Active = boot.Active.other()
		return d.mem.boot.write(d.boot)
	}
	if err := d.mem.r.put(recImage+string(boot.Active), d.c.Firmware); err != nil {
		return err
	}
	_, err = d.loadImage(boot.Active)
	return err
}

// loadImage reads the image in s; false if there is none that can run.
func (d *Device) loadImage(s side) (bool, error) {
	l, ok, err := d.readSlot(s)
	if !ok || err != nil || l.fw.SecureVersion < d.fuse {
		return false, err
	}
	d.fw, d.image = l.fw, l.image
	d.conduct, err = l.fw.conduct()
	return err == nil, err
}

// slot is what an OTA slot holds. The zero value is nothing that is an image.
type slot struct {
	fw    Firmware
	image fleet.Hash
}

// readSlot reads the image in s; false if there is none.
func (d *Device) readSlot(s side) (slot, bool, error) {
	b, err := d.mem.r.get(recImage + string(s))
	if b == nil || err != nil {
		return slot{}, false, err
	}
	fw, err := ParseImage(b)
	if err != nil {
		return slot{}, false, nil
	}
	return slot{fw, fleet.HashOf(sha256.Sum256(b))}, true, nil
}

// goBack selects the previous image, remembers what to report, and reboots for a reason. Without a previous image the new
// one stays.
func (d *Device) goBack(why, reason string) error {
	bad := d.image
	ok, err := d.loadImage(d.boot.Active.other())
	if err != nil {
		return err
	}
	b := bootRecord{Active: d.boot.Active}
	if ok {
		b = bootRecord{Active: d.boot.Active.other(), Failed: bad, Undone: d.boot.Job, Because: why}
	}
	if err := d.mem.boot.write(b); err != nil {
		return err
	}
	if ok {
		d.count(func(c *Counts) { c.Rollbacks++ })
		d.emit(RolledBack, "to %s: %s", d.fw.Version, why)
	}
	return reboot{reason}
}

// confirm marks the running image valid: muster has answered it.
func (d *Device) confirm() error {
	if !d.boot.Verify {
		return nil
	}
	d.boot = bootRecord{Active: d.boot.Active}
	if err := d.mem.boot.write(d.boot); err != nil {
		return err
	}
	d.confirmed.Store(true)
	d.emit(Confirmed, "%s", d.fw.Version)
	if d.fw.SecureVersion <= d.fuse {
		return nil
	}
	d.fuse = d.fw.SecureVersion
	return d.mem.fuse.write(d.fuse)
}

// loadCredentials reads the slots and starts trying doors afresh.
func (d *Device) loadCredentials() error {
	var err error
	if d.ids, err = d.mem.identities(); err != nil {
		return err
	}
	order, err := d.mem.preferred(d.ids)
	if err != nil {
		return err
	}
	pws, err := d.mem.passwords()
	if err != nil {
		return err
	}
	d.doors = newDoors(d.c.Timing.Fallback, order, sidesOf(pws))
	d.bound, err = d.mem.bound(d.ids)
	return err
}

func sidesOf(pws []passwordAt) []side {
	var out []side
	for _, p := range pws {
		out = append(out, p.at)
	}
	return out
}

// sleep returns false if ctx ended first.
func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}
