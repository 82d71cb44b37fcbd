//! Images.

use super::timestamp;
use crate::agent::{self, ContainerSource, ImageContent, ImageImport};
use crate::api::error::ApiError;
use crate::api::types::{CONTAINER_MIB_MAX_DEFAULT, ContainerProgram, Image, ImageContainer, ImageImportRequest};
use crate::units::Bytes;

/// An image.
pub(in crate::api) fn image(image: agent::Image) -> Image {
    let agent::Image { name, digest, kernel_bytes, initrd_bytes, command_line, memory_mib_min, container, created_at } =
        image;
    Image {
        name,
        digest,
        kernel_bytes,
        initrd_bytes,
        command_line,
        memory_mib_min,
        container: container.map(image_container),
        created_at: timestamp(created_at),
    }
}

fn image_container(origin: agent::ContainerOrigin) -> ImageContainer {
    let agent::ContainerOrigin {
        container: source,
        manifest,
        layers,
        like,
        devices_left_out,
        attributes_left_out,
        program,
    } = origin;
    let program = program.map(|program| {
        let agent::ContainerProgram { arguments, environment, directory, user } = program;
        ContainerProgram { arguments, environment, directory, user }
    });
    ImageContainer { source, manifest, layers, like, devices_left_out, attributes_left_out, program }
}

/// What is to be imported: exactly one of kernel, archive and layout.
pub(in crate::api) fn import(request: ImageImportRequest) -> Result<ImageImport, ApiError> {
    let ImageImportRequest {
        name,
        kernel_path,
        initrd_path,
        rootfs_path,
        oci_path,
        reference,
        like,
        unpacked_mib_max,
        command_line,
    } = request;
    let refused = |message: &str| ApiError::bad_request("invalid_import", message);
    let of_containers = reference.is_some() || like.is_some() || unpacked_mib_max.is_some();
    let source = match (kernel_path, rootfs_path, oci_path) {
        (Some(_), None, None) if of_containers => {
            return Err(refused("reference, like and unpacked_mib_max are for containers"));
        }
        (Some(kernel_path), None, None) => {
            let content = ImageContent::Files { kernel_path, initrd_path };
            return Ok(ImageImport { name, content, command_line });
        }
        (None, Some(_), None) if reference.is_some() => return Err(refused("reference is for an OCI layout")),
        (None, Some(rootfs), None) => ContainerSource::Rootfs(rootfs.into()),
        (None, None, Some(layout)) => ContainerSource::Oci { layout: layout.into(), reference },
        _ => return Err(refused("exactly one of kernel_path, rootfs_path and oci_path is needed")),
    };
    if initrd_path.is_some() {
        return Err(refused("initrd_path is for a kernel_path: a container becomes the initrd itself"));
    }
    let (ContainerSource::Rootfs(path) | ContainerSource::Oci { layout: path, .. }) = &source;
    if !path.is_absolute() {
        return Err(refused("the container's path is not absolute"));
    }
    let mib = unpacked_mib_max.unwrap_or(CONTAINER_MIB_MAX_DEFAULT);
    let bytes = Bytes::from_mib(mib).filter(|bytes| bytes.0 > 0);
    let unpacked_bytes_max = bytes.ok_or_else(|| refused("unpacked_mib_max is not a size"))?.0;
    Ok(ImageImport { name, content: ImageContent::Container { source, like, unpacked_bytes_max }, command_line })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_import_says_one_thing() {
        let read = |json: &str| import(serde_json::from_str::<ImageImportRequest>(json).unwrap());
        let made = read(r#"{"name":"a","kernel_path":"/k","initrd_path":"/i"}"#).unwrap();
        assert!(
            matches!(made.content, ImageContent::Files { initrd_path: Some(_), .. }) && made.command_line.is_none()
        );
        let made = read(r#"{"name":"a","oci_path":"/d","reference":"web","like":"b","unpacked_mib_max":1}"#).unwrap();
        let source = ContainerSource::Oci { layout: "/d".into(), reference: Some("web".to_owned()) };
        let like = Some("b".to_owned());
        assert_eq!(made.content, ImageContent::Container { source, like, unpacked_bytes_max: 1 << 20 });
        let made = read(r#"{"name":"a","rootfs_path":"/r"}"#).unwrap();
        assert!(
            matches!(made.content, ImageContent::Container { unpacked_bytes_max, .. } if unpacked_bytes_max == 4 << 30)
        );
        for (json, wanted) in [
            (r#"{"name":"a"}"#, "exactly one"),
            (r#"{"name":"a","kernel_path":"/k","rootfs_path":"/r"}"#, "exactly one"),
            (r#"{"name":"a","oci_path":"/k","rootfs_path":"/r"}"#, "exactly one"),
            (r#"{"name":"a","kernel_path":"/k","like":"demo"}"#, "are for containers"),
            (r#"{"name":"a","kernel_path":"/k","unpacked_mib_max":1}"#, "are for containers"),
            (r#"{"name":"a","rootfs_path":"/r","reference":"x"}"#, "reference is for an OCI layout"),
            (r#"{"name":"a","rootfs_path":"/r","initrd_path":"/i"}"#, "initrd_path is for"),
            (r#"{"name":"a","rootfs_path":"r"}"#, "not absolute"),
            (r#"{"name":"a","oci_path":"/d","unpacked_mib_max":0}"#, "not a size"),
            (r#"{"name":"a","oci_path":"/d","unpacked_mib_max":18446744073709551615}"#, "not a size"),
        ] {
            let error = read(json).unwrap_err();
            assert!(error.status == 400 && error.detail.message.contains(wanted), "{json}: {:?}", error.detail);
        }
    }
}
