terraform {
  required_version = ">= 1.9"
  required_providers {
    aws = {
      source  = "hashicorp/aws"
      version = "~> 5.100"
    }
  }
}

# Credentials come from the environment or a profile, never from a file in here. Keep the state in a
# private, encrypted, versioned bucket of its own: `terraform init -backend-config=...`.
provider "aws" {
  region                      = var.region
  s3_use_path_style           = var.endpoint != ""
  skip_credentials_validation = var.endpoint != ""
  skip_metadata_api_check     = var.endpoint != ""

  default_tags {
    tags = { project = var.name }
  }

  dynamic "endpoints" {
    for_each = var.endpoint == "" ? [] : [var.endpoint]
    content {
      ec2              = endpoints.value
      ecs              = endpoints.value
      iam              = endpoints.value
      logs             = endpoints.value
      rds              = endpoints.value
      s3               = endpoints.value
      secretsmanager   = endpoints.value
      servicediscovery = endpoints.value
      sts              = endpoints.value
    }
  }
}
