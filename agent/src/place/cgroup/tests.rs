//! Layouts of cgroup paths. Those marked *seen* were recorded on a machine; the others follow the source of the software named.

use proptest::prelude::*;

use super::*;

const ID: &str = "4f7c9a1b2d3e4f5a6b7c8d9e0f1a2b3c4d5e6f708192a3b4c5d6e7f8091a2b3c";
const OUTER: &str = "00aa11bb22cc33dd44ee55ff66007711882299aa33bb44cc55dd66ee77ff8899";
const UID: &str = "0b6f2a5e-8f43-4f0e-9d8f-6a1f0c3b2d4e";
const SLICE: &str = "0b6f2a5e_8f43_4f0e_9d8f_6a1f0c3b2d4e";
const HASH: &str = "8d3b9d1c5e7f4a6b8c9d0e1f2a3b4c5d";

fn pod(container: Option<&str>, uid: &str) -> CgroupPlace {
    CgroupPlace {
        container_id: container.map(str::to_owned),
        pod_uid: Some(uid.to_owned()),
        ..CgroupPlace::default()
    }
}

/// Where users make folders.
fn users(place: CgroupPlace) -> CgroupPlace {
    CgroupPlace {
        is_users: true,
        ..place
    }
}

fn container(id: &str) -> CgroupPlace {
    CgroupPlace {
        container_id: Some(id.to_owned()),
        ..CgroupPlace::default()
    }
}

fn unit(name: &str) -> CgroupPlace {
    CgroupPlace {
        unit: Some(name.to_owned()),
        ..CgroupPlace::default()
    }
}

#[test]
fn layouts_of_distributions_are_understood() {
    let cases: Vec<(&str, String, CgroupPlace)> = vec![
        // kubelet pkg/kubelet/cm: `kubepods[-qos]-podUID.slice`; containerd's CRI names the scope `cri-containerd-ID`. EKS, AKS and GKE on v2 alike.
        (
            "kubeadm, systemd driver, v2",
            format!(
                "0::/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{SLICE}.slice/cri-containerd-{ID}.scope\n"
            ),
            pod(Some(ID), UID),
        ),
        (
            "guaranteed pod, systemd driver: no folder for the class",
            format!("0::/kubepods.slice/kubepods-pod{SLICE}.slice/cri-containerd-{ID}.scope\n"),
            pod(Some(ID), UID),
        ),
        (
            "guaranteed pod, cgroupfs driver",
            format!("0::/kubepods/pod{UID}/{ID}\n"),
            pod(Some(ID), UID),
        ),
        // Seen with containerd 1.6.20 and runc 1.1.5, all nine v1 hierarchies and `0::` alike.
        (
            "containerd, cgroupfs driver, hybrid (seen)",
            format!(
                "12:cpu,cpuacct:/kubepods/besteffort/pod{UID}/{ID}\n1:name=systemd:/kubepods/besteffort/pod{UID}/{ID}\n0::/kubepods/besteffort/pod{UID}/{ID}\n"
            ),
            pod(Some(ID), UID),
        ),
        // Seen with containerd 1.6.20: a systemd path given to the cgroupfs driver.
        (
            "driver mismatch (seen)",
            format!("0::/kubepods-burstable-pod{SLICE}.slice:cri-containerd:{ID}\n"),
            pod(Some(ID), UID),
        ),
        // containerd issue 4857 and others: the same form below the service that made it.
        (
            "driver mismatch below containerd's service",
            format!("0::/system.slice/containerd.service/kubepods-besteffort-pod{SLICE}.slice:cri-containerd:{ID}\n"),
            pod(Some(ID), UID),
        ),
        // Seen with a youki-based shim (containerd-shim-wasm 1.0.1).
        (
            "runwasi shim on a hybrid host (seen)",
            format!("9:memory:/kubepods/besteffort/pod{UID}/{ID}\n1:name=systemd:/\n0::/\n"),
            pod(Some(ID), UID),
        ),
        // Seen on a 6.1 kernel with v2 only.
        (
            "runwasi shim, v2 (seen, ids shortened there)",
            format!("0::/kubepods/besteffort/pod{UID}/{ID}\n"),
            pod(Some(ID), UID),
        ),
        // containerd puts a shim into the pod's own cgroup when told so.
        (
            "shim in the cgroup of its pod",
            format!("0::/kubepods/burstable/pod{UID}\n"),
            pod(None, UID),
        ),
        // CRI-O internal/config/cgmgr: prefix `crio`; OpenShift runs it with systemd.
        (
            "OpenShift, CRI-O with systemd",
            format!(
                "0::/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{SLICE}.slice/crio-{ID}.scope/container\n"
            ),
            pod(Some(ID), UID),
        ),
        (
            "CRI-O with cgroupfs",
            format!("0::/kubepods/besteffort/pod{UID}/crio-{ID}\n"),
            pod(Some(ID), UID),
        ),
        (
            "CRI-O's monitor is beside the container, not in it",
            format!(
                "0::/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{SLICE}.slice/crio-conmon-{ID}.scope\n"
            ),
            pod(None, UID),
        ),
        // cri-dockerd: the scope is named by docker.
        (
            "minikube with docker as runtime, v1",
            format!(
                "11:pids:/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{SLICE}.slice/docker-{ID}.scope\n1:name=systemd:/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{SLICE}.slice/docker-{ID}.scope\n"
            ),
            pod(Some(ID), UID),
        ),
        // kind's kubelet has `--cgroup-root=/kubelet`; seen from the host, the node is a docker container.
        (
            "kind, systemd driver, seen from the host",
            format!(
                "0::/system.slice/docker-{OUTER}.scope/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-besteffort.slice/kubelet-kubepods-besteffort-pod{SLICE}.slice/cri-containerd-{ID}.scope\n"
            ),
            pod(Some(ID), UID),
        ),
        (
            "kind, cgroupfs driver, v1",
            format!("5:cpu:/docker/{OUTER}/kubelet/kubepods/burstable/pod{UID}/{ID}\n"),
            pod(Some(ID), UID),
        ),
        // k3s and RKE2 run the kubelet in their own process; containerd is theirs, the layout is the kubelet's.
        (
            "k3s, v2",
            format!("0::/kubepods/burstable/pod{UID}/{ID}\n"),
            pod(Some(ID), UID),
        ),
        (
            "RKE2, systemd driver",
            format!(
                "0::/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{SLICE}.slice/cri-containerd-{ID}.scope\n"
            ),
            pod(Some(ID), UID),
        ),
        (
            "k3d, the node in docker with cgroupfs",
            format!("0::/docker/{OUTER}/kubepods/besteffort/pod{UID}/{ID}\n"),
            pod(Some(ID), UID),
        ),
        (
            "GKE COS of the v1 days, cgroupfs",
            format!(
                "8:memory:/kubepods/burstable/pod{UID}/{ID}\n1:name=systemd:/kubepods/burstable/pod{UID}/{ID}\n0::/\n"
            ),
            pod(Some(ID), UID),
        ),
        (
            "Bottlerocket (EKS), systemd driver below the runtime's slice",
            format!(
                "0::/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{SLICE}.slice/cri-containerd-{ID}.scope\n"
            ),
            pod(Some(ID), UID),
        ),
        // kubelet: a pod from a file has the MD5 of its manifest for a UID.
        (
            "static pod",
            format!(
                "0::/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{HASH}.slice/cri-containerd-{ID}.scope\n"
            ),
            pod(Some(ID), HASH),
        ),
        // cgroup_namespaces(7): paths are relative to the reader's own.
        (
            "from a pod's cgroup namespace, cgroupfs",
            format!("0::/../../pod{UID}/{ID}\n"),
            pod(Some(ID), UID),
        ),
        (
            "from a pod's cgroup namespace, systemd",
            format!("0::/../../kubepods-burstable-pod{SLICE}.slice/cri-containerd-{ID}.scope\n"),
            pod(Some(ID), UID),
        ),
        ("docker, cgroupfs", format!("0::/docker/{ID}\n"), container(ID)),
        (
            "docker, systemd",
            format!("0::/system.slice/docker-{ID}.scope\n"),
            container(ID),
        ),
        // Seen with podman 4.3.1.
        (
            "podman with its own parent (seen)",
            format!("0::/libpod_parent/libpod-{ID}\n"),
            container(ID),
        ),
        (
            "rootless podman",
            format!("0::/user.slice/user-1000.slice/user@1000.service/user.slice/libpod-{ID}.scope/container\n"),
            users(container(ID)),
        ),
        (
            "service",
            "0::/system.slice/nginx.service\n".to_owned(),
            unit("nginx.service"),
        ),
        (
            "service of a user",
            "0::/user.slice/user-1000.slice/user@1000.service/app.slice/edge@1.service\n".to_owned(),
            users(unit("edge@1.service")),
        ),
        (
            "session",
            "0::/user.slice/user-1000.slice/session-3.scope\n".to_owned(),
            users(unit("session-3.scope")),
        ),
        (
            "service, v1: systemd's own hierarchy knows",
            "4:memory:/system.slice/other.service\n1:name=systemd:/system.slice/nginx.service\n".to_owned(),
            unit("nginx.service"),
        ),
        ("the root", "0::/\n".to_owned(), CgroupPlace::default()),
        ("nothing", String::new(), CgroupPlace::default()),
    ];
    for (name, file, expected) in cases {
        assert_eq!(parse(file.as_bytes()), expected, "{name}: {file}");
    }
}

#[test]
fn a_tenant_cannot_name_another_pod_below_its_own() {
    let other = "11111111-2222-3333-4444-555555555555";
    let path = format!("/kubepods/besteffort/pod{UID}/{ID}/kubepods/pod{other}/{OUTER}");
    assert_eq!(parse_path(&path), pod(Some(ID), UID));
}

#[test]
fn a_user_cannot_name_a_pod_in_a_folder_of_their_own() {
    for above in ["", "/../.."] {
        for folder in ["kubepods/", ""] {
            let path = format!("{above}/user.slice/user-1000.slice/user@1000.service/{folder}pod{UID}/x");
            assert_eq!(parse_path(&path), users(unit("user@1000.service")), "{path}");
        }
    }
}

#[test]
fn lines_that_contradict_each_other_say_nothing() {
    let other = "11111111-2222-3333-4444-555555555555";
    let file = format!("3:cpu:/kubepods/pod{UID}/{ID}\n0::/kubepods/pod{other}/{OUTER}\n");
    assert_eq!(parse(file.as_bytes()), CgroupPlace::default());
    let file = format!("3:cpu:/kubepods/pod{UID}/{ID}\n0::/kubepods/pod{UID}/{OUTER}\n");
    assert_eq!(parse(file.as_bytes()), pod(None, UID));
}

#[test]
fn what_only_looks_like_a_pod_is_none() {
    for path in [
        format!("/pod{UID}/x"),
        format!("/kubepods/pod{UID}0/x"),
        "/kubepods/podcast".to_owned(),
        "/kubepods/burstable/podnot-a-uid".to_owned(),
        "/kubepods.slice/kubepods-burstable.slice".to_owned(),
        format!("/{}", "kubepods/".repeat(1000)),
    ] {
        assert_eq!(parse_path(&path), CgroupPlace::default(), "{path}");
    }
}

proptest! {
    #[test]
    fn no_file_makes_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..4096)) {
        let _ = parse(&bytes);
    }

    #[test]
    fn no_path_makes_it_panic_and_answers_are_well_formed(
        path in "(/|:|-|_|pod|kubepods|\\.slice|\\.scope|\\.service|[0-9a-f]{32}|[0-9a-f]{64}|é|\\PC){0,40}"
    ) {
        let found = parse_path(&path);
        if let Some(id) = found.container_id {
            prop_assert!(is_container_id(&id));
        }
        if let Some(uid) = found.pod_uid {
            prop_assert!(is_uid(&uid));
        }
    }
}
