package e2e

import (
	"crypto/tls"
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"

	"muster/api"
	"muster/internal/fleet"
	"muster/internal/simdev"
)

// publish sends a message at QoS 1 with mosquitto, which waits for the acknowledgement.
func (s *scene) publish(id fleet.DeviceID, word, payload string) {
	s.Helper()
	file := s.write("payload", []byte(payload))
	if out, code := s.command("mosquitto_pub", append(s.front(id, s.kit(id)), "-t", "d/"+string(id)+"/up/"+word, "-f", file)...); code != 0 {
		s.Errorf("publish to %s: exit code %d: %s", word, code, out)
	}
}

func TestBadMessagesEndInQuarantineAndNobodyElseNotices(t *testing.T) {
	t.Parallel()
	s := newScene(t, shared, "garbling")
	ids := s.add(2)
	bad, neighbour := ids[0], ids[1]
	image := strings.Repeat("ab", 32)
	messages := []struct{ what, word, payload, reason string }{
		{"no JSON", "hello", "not json at all", "not the JSON"},
		{"a name twice", "hello", `{"v":"1.0.0","v":"2.0.0","img":"` + image + `"}`, "not the JSON"},
		{"an unknown name", "hello", `{"v":"1.0.0","img":"` + image + `","admin":true}`, "not the JSON"},
		{"nothing", "state", "", "empty"},
		{"too long", "state", `{"x":"` + strings.Repeat("x", 20<<10) + `"}`, "longer than"},
		{"an unknown word", "ota", `{"job":"none","step":"done"}`, "step"},
		{"not UTF-8", "state", "{\"x\":\"\xff\xfe\"}", "not the JSON"},
	}
	for _, m := range messages {
		s.publish(bad, m.word, m.payload)
		s.publish(neighbour, "state", fmt.Sprintf(`{"after %s":true}`, m.what))
	}
	s.publish(bad, "state", `{"still":"heard"}`)
	s.await("what is good is stored", func() bool {
		st := string(s.device(neighbour).Status.State)
		for _, m := range messages {
			if !strings.Contains(st, "after "+m.what) {
				return false
			}
		}
		return strings.Contains(string(s.device(bad).Status.State), "heard")
	})

	list := s.quarantined(bad)
	if len(list) != len(messages) || len(s.quarantined(neighbour)) != 0 {
		t.Fatalf("%d in quarantine, %d of the neighbour, want %d and 0: %+v", len(list), len(s.quarantined(neighbour)), len(messages), list)
	}
	for i, m := range messages {
		q := read[api.Quarantined](s, "quarantine", "show", fmt.Sprint(list[i].Seq))
		if !strings.Contains(q.Reason, m.reason) || q.Size != len(m.payload) || q.Vhost != "devices" {
			t.Errorf("%s: %q of %d bytes in %s, want %q, %d bytes", m.what, q.Reason, q.Size, q.Vhost, m.reason, len(m.payload))
		}
		if !strings.HasPrefix(m.payload, string(q.Body)) {
			t.Errorf("%s: the body is not what was sent: %q", m.what, q.Body)
		}
	}
	for _, q := range list {
		s.muster("quarantine", "drop", fmt.Sprint(q.Seq))
	}
	if left := s.quarantined(bad); len(left) != 0 {
		t.Errorf("left after drop: %+v", left)
	}
	if v := s.device(bad).Status.Version; v != "" {
		t.Errorf("a bad hello was believed: version %q", v)
	}
}

// quarantined lists the messages of a device that could not be handled, oldest first.
func (s *scene) quarantined(id fleet.DeviceID) (out []api.Quarantined) {
	s.Helper()
	for _, q := range read[[]api.Quarantined](s, "quarantine", "list", "--limit", "0") {
		if strings.HasPrefix(q.Key, "d."+string(id)+".") {
			out = append(out, q)
		}
	}
	return out
}

// TestDeviceOfMQTT311 is a device made of mosquitto's clients and the files that the CLI wrote.
func TestDeviceOfMQTT311(t *testing.T) {
	t.Parallel()
	s := newScene(t, shared, "oldtimer")
	id := s.add(1)[0]
	image := strings.Repeat("0f", 32)
	begin := time.Now().Add(-time.Second)
	topic := "d/" + string(id)
	answer, code := s.command("mosquitto_rr", append(s.front(id, s.kit(id)), "-t", topic+"/up/hello", "-e", topic+"/dn/cmd", "-W", "15",
		"-m", `{"v":"0.9.1","img":"`+image+`","hw":"rev-c","chip":"esp8266"}`)...)
	var cmd struct {
		Op   string `json:"op"`
		Time int64  `json:"t"`
	}
	if err := json.Unmarshal([]byte(answer), &cmd); err != nil || code != 0 {
		t.Fatalf("exit code %d, %v: %s", code, err, answer)
	}
	if at := time.Unix(cmd.Time, 0); cmd.Op != "hello" || at.Before(begin.Add(-time.Second)) || at.After(time.Now().Add(time.Second)) {
		t.Errorf("answered %s at %v", answer, at)
	}
	if d := s.device(id).Status; d.Version != "0.9.1" || d.Image != image || d.Chip != "esp8266" || d.Hardware != "rev-c" {
		t.Errorf("muster knows %+v", d)
	}
	s.await("connected once", func() bool { return !s.device(id).Status.ConnectedAt.IsZero() })

	payload := fmt.Sprintf(`{"t":21.5,"run":%d}`, time.Now().UnixNano())
	s.publish(id, "tm/env", payload)
	if key := s.fromStream(payload); key != "d."+string(id)+".up.tm.env" {
		t.Errorf("in the stream under %q", key)
	}
	if q := s.quarantined(id); len(q) != 0 {
		t.Errorf("in quarantine: %+v", q)
	}
}

// fromStream reads the telemetry stream from its beginning to a payload, and returns its routing key.
func (s *scene) fromStream(payload string) string {
	s.Helper()
	password := strings.TrimSpace(s.file(s.w.Config.Path(s.w.Config.Broker.PasswordFile)))
	conn, err := amqp.DialConfig("amqps://"+s.w.Config.Broker.AMQPS+"/devices", amqp.Config{
		SASL: []amqp.Authentication{&amqp.PlainAuth{Username: "muster", Password: password}}, Vhost: "devices",
		TLSClientConfig: &tls.Config{RootCAs: s.w.Trust}, Dial: amqp.DefaultDial(15 * time.Second),
	})
	if err != nil {
		s.Fatal(err)
	}
	defer conn.Close()
	ch, err := conn.Channel()
	if err != nil {
		s.Fatal(err)
	}
	if err := ch.Qos(100, 0, false); err != nil {
		s.Fatal(err)
	}
	in, err := ch.ConsumeWithContext(s.ctx, "telemetry", "", false, false, false, false, amqp.Table{"x-stream-offset": "first"})
	if err != nil {
		s.Fatal(err)
	}
	for {
		select {
		case m, ok := <-in:
			if !ok {
				s.Fatal("the broker ended the consumer")
			}
			if string(m.Body) == payload {
				return m.RoutingKey
			}
			if err := m.Ack(false); err != nil {
				s.Fatal(err)
			}
		case <-s.ctx.Done():
			s.Fatal("not in the stream")
		}
	}
}

// TestDeviceThatNamesAnotherIsNotBelieved: what a device writes of another one is its own.
func TestDeviceThatNamesAnotherIsNotBelieved(t *testing.T) {
	t.Parallel()
	s := newScene(t, shared, "lying")
	ids := s.add(2)
	liar, victim := ids[0], ids[1]
	s.runAll([]fleet.DeviceID{victim}, nil)
	s.await("the victim's own state", func() bool { return !s.device(victim).Status.StateAt.IsZero() })
	before := s.device(victim)
	s.run(liar, func(c *simdev.Config) { c.Faults.ClaimID = victim })
	s.await("the liar's state", func() bool { return strings.Contains(string(s.device(liar).Status.State), string(victim)) })
	s.await("the liar's report is set aside", func() bool { return len(s.quarantined(liar)) > 0 })
	if after := s.device(victim); string(after.Status.State) != string(before.Status.State) || after.Rev != before.Rev {
		t.Errorf("the victim was %+v and is %+v", before, after)
	}
}
