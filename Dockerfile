# muster: static binaries on an empty base. No shell, no package manager, not root.
FROM golang:1.26-bookworm AS build
WORKDIR /src
COPY go.mod go.sum ./
RUN go mod download
COPY . .
ARG VERSION=dev
RUN CGO_ENABLED=0 go build -trimpath -ldflags "-s -w -X main.version=${VERSION}" -o /out/ ./cmd/musterd ./cmd/muster ./cmd/devicesim \
 && mkdir -p /out/rootfs/var/lib/muster /out/rootfs/tmp

FROM scratch
COPY --from=build /etc/ssl/certs/ca-certificates.crt /etc/ssl/certs/ca-certificates.crt
COPY --from=build /usr/share/zoneinfo /usr/share/zoneinfo
COPY --from=build --chown=10001:10001 /out/rootfs/ /
COPY --from=build /out/musterd /out/muster /out/devicesim /usr/local/bin/
USER 10001:10001
VOLUME /var/lib/muster
# 8443 devices, 8444 recovery, 9443 ops. The broker's questions come over loopback (deploy/compose.yaml).
EXPOSE 8443 8444 9443
ENTRYPOINT ["/usr/local/bin/musterd"]
CMD ["serve", "--config", "/var/lib/muster/musterd.yaml"]
