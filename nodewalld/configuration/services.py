"""Services by name: the built-in ones, under firewalld's names where it has one, and what they mean.

Source of names and ports: firewalld's services; the documentation of Kubernetes, k3s, RKE2, Calico, Cilium and flannel
for the ports that nodes need among each other.
"""

from nodewalld.core.config import PortRange, ProtocolPorts, Service

_BUILT_IN = """
ssh 22/tcp
http 80/tcp
https 443/tcp
http3 443/udp
dns 53/tcp 53/udp
dns-over-tls 853/tcp
ntp 123/udp
nts 4460/tcp
smtp 25/tcp
smtps 465/tcp
smtp-submission 587/tcp
imap 143/tcp
imaps 993/tcp
pop3 110/tcp
pop3s 995/tcp
ldap 389/tcp
ldaps 636/tcp
kerberos 88/tcp 88/udp
nfs 2049/tcp
nfs3 2049/tcp 2049/udp
ceph 6800-7300/tcp
ceph-mon 3300/tcp 6789/tcp
rpc-bind 111/tcp 111/udp
mountd 20048/tcp 20048/udp
samba 137-138/udp 139/tcp 445/tcp
iscsi-target 3260/tcp
rsyncd 873/tcp 873/udp
syslog 514/udp
syslog-tls 6514/tcp 6514/udp
nrpe 5666/tcp
ptp 319/udp 320/udp
zabbix-agent 10050/tcp
snmp 161/udp
snmptrap 162/udp
tftp 69/udp
ftp 21/tcp
mysql 3306/tcp
postgresql 5432/tcp
redis 6379/tcp
mongodb 27017/tcp
mdns 5353/udp
dhcp 67/udp
dhcpv6 547/udp
dhcpv6-client 546/udp
cockpit 9090/tcp
prometheus 9090/tcp
node-exporter 9100/tcp
prometheus-node-exporter 9100/tcp
grafana 3000/tcp
elasticsearch 9200/tcp 9300/tcp
openvpn 1194/udp
wireguard 51820-51821/udp
ipsec 500/udp 4500/udp esp ah
vrrp vrrp
bgp 179/tcp
gre gre
kube-apiserver 6443/tcp
kubelet 10250/tcp
kubelet-readonly 10255/tcp
kube-proxy-health 10256/tcp
kube-scheduler 10251/tcp
kube-scheduler-secure 10259/tcp
kube-controller-manager 10252/tcp
kube-controller-manager-secure 10257/tcp
kube-nodeport-services 30000-32767/tcp 30000-32767/udp
kube-control-plane 2379/tcp 2380/tcp 6443/tcp 10252/tcp 10251/tcp
kube-control-plane-secure 2379/tcp 2380/tcp 6443/tcp 10257/tcp 10259/tcp
kube-worker 10250/tcp 30000-32767/tcp 30000-32767/udp
etcd-client 2379/tcp
etcd-server 2380/tcp
docker-registry 5000/tcp
docker-swarm 2377/tcp 7946/tcp 7946/udp 4789/udp
flannel-vxlan 8472/udp
flannel-udp 8285/udp
flannel-wireguard 51820-51821/udp
calico-vxlan 4789/udp
calico-ipip ipip
calico-typha 5473/tcp
calico-wireguard 51820-51821/udp
cilium-health 4240/tcp
cilium-vxlan 8472/udp
cilium-geneve 6081/udp
cilium-hubble 4244/tcp
weave-net 6783/tcp 6783-6784/udp
kube-router-bgp 179/tcp
metallb-memberlist 7946/tcp 7946/udp
rke2-supervisor 9345/tcp
k3s-embedded-registry 5001/tcp
"""

_NUMBERS = {"ipip": "4", "gre": "47", "esp": "esp", "ah": "ah", "vrrp": "112"}


def _service(line: str) -> tuple[str, Service]:
    name, *parts = line.split()
    ports = [part for part in parts if "/" in part]
    protocols = tuple(_NUMBERS[part] for part in parts if "/" not in part)
    return name, Service(tuple(_ports(part) for part in ports), protocols)


def _ports(text: str) -> ProtocolPorts:
    span, _, protocol = text.partition("/")
    first, _, last = span.partition("-")
    return ProtocolPorts(protocol, PortRange(int(first), int(last or first)))


BUILT_IN = dict(_service(line) for line in _BUILT_IN.split("\n") if line)
"""Every built-in service by its name."""
